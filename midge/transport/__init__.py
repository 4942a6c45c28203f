"""The connection to the broker: MQTT, one in memory with faults, and an embedded broker."""
