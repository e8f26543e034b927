"""Two language models under one budget of KV memory: `scripts/demo`, some minutes on two cores."""
