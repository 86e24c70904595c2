from lorakit.settings import Gating

__all__ = ["Gating"]
