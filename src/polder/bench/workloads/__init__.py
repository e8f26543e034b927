"""The traces, the models, and the requests that are made of them."""
