"""A fleet under bursts, sleeps and a stopped broker (scripts/soak_fleet)."""
