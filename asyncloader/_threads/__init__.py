"""Which work may run, and when: threads, the gate for reads, the loop's lag, the byte budget."""
