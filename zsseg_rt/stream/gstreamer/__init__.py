"""GStreamer, which is optional: CSI cameras, own pipelines, RTSP with little delay, RTSP output.

Nothing here imports PyGObject before a source or a sink needs it.
"""
