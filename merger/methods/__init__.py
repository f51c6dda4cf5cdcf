"""The families of methods. Importing this package makes every method known to `Method`."""

from merger.methods import alignment as alignment
from merger.methods import arcs as arcs
from merger.methods import averaging as averaging
from merger.methods import depth as depth
from merger.methods import experts as experts
from merger.methods import extraction as extraction
from merger.methods import fine_tunes as fine_tunes
from merger.methods import informed as informed
from merger.methods import lora as lora
from merger.methods import lorahub as lorahub
from merger.methods import masks as masks
from merger.methods import mergekit as mergekit
from merger.methods import merges as merges
from merger.methods import moe as moe
from merger.methods import routing as routing
from merger.methods import search as search
from merger.methods import soups as soups
from merger.methods import spectral as spectral
from merger.methods.method import Method

METHODS: dict[str, type[Method]] = dict(sorted(Method.by_name.items()))
