"""Two language models under one budget of KV memory, in five minutes on two cores: `scripts/demo`."""
