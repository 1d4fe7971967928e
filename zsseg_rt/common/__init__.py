"""The ground of every room: strict JSON and TOML, arrays, files written whole, extras, CPUs."""
