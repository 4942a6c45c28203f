"""The wire: bytes <-> typed values.

Nothing here knows of MQTT, of a coordinator or of an agent, and importing any of it needs no numpy but for `codecs`.
docs/protocol.md specifies what these files do.
"""
