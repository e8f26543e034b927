"""What an engine core agrees on with the broker, before its KV cache exists."""
