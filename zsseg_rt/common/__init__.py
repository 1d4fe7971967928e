"""What every room stands on: strict JSON and TOML, arrays, files written whole, extras, CPUs."""
