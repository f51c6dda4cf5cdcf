"""The families of methods. Importing this package makes every method known to `Method`."""

from merger.methods import averaging as averaging
from merger.methods.method import Method

METHODS: dict[str, type[Method]] = dict(sorted(Method.by_name.items()))
