"""The mixers of prepared models: what a layer does between its projections, on the operators of `ops`."""

from statecache.models.mixers.base import Mixer as Mixer
from statecache.models.mixers.base import Recurrent as Recurrent
from statecache.models.mixers.table import MIXERS as MIXERS
