"""Who may run, and when: threads, the gate for reads, the lag of the loop, the byte budget."""
