"""The presets, as YAML alone. A package, so that an installed wheel carries them (``pkg://conf``)."""
