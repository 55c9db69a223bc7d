"""Opinion monitoring: watches what people write on topics, and alarms once when a mood turns."""
