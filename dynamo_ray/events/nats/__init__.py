"""The event plane over NATS; docs/events.md says what is published where."""
