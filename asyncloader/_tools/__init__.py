"""Tools: inspect, verify, compare, convert."""
