"""The demo: one masked network on handwritten digits, trained in PyTorch and in Flax, to see that they agree.

``maskedlinear demo`` runs it. It needs scikit-learn, rich, matplotlib and the frameworks, all in the extra ``all``; this
package imports none of them until the demo runs.
"""

from maskedlinear.demo.settings import Settings

__all__ = ["Settings"]
