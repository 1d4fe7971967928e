"""GStreamer, which is optional: CSI cameras, own pipelines, RTSP. Imports PyGObject when needed."""
