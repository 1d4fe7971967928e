"""One frame from pixels to labels: enqueued, recorded and replayed; what stays on a GPU."""
