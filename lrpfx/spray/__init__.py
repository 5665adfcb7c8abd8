"""Maps of many samples -> the strategies among them: spectral relevance analysis (SpRAy).

A class can be recognised in several ways, one of which may be a watermark. Their maps look
different, and cluster. This needs scikit-learn: ``pip install 'lrpfx[spray]'``.

Source: Lapuschkin et al. 2019, https://doi.org/10.1038/s41467-019-08987-4, Methods.
"""

from lrpfx.spray.cluster import SpectralRelevance
from lrpfx.spray.strategies import Strategies
from lrpfx.spray.strategy import Strategy
from lrpfx.spray.virelay import to_virelay

__all__ = ["SpectralRelevance", "Strategies", "Strategy", "to_virelay"]

# As in lrpfx itself: what is public shows the public path.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
