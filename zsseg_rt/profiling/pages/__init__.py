"""Reports for readers: tables, charts, one HTML file, a trace."""
