from typing import Any
Backend = Any
