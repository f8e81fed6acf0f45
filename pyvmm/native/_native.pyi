# The compiled cffi module; cffi objects have no useful static types.
from typing import Any

ffi: Any
lib: Any
