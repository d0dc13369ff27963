"""PEFT's layer over bitsandbytes' Linear4bit, with our forward. PEFT's own exists where bitsandbytes is installed."""

from peft.import_utils import is_bnb_4bit_available

from .peft import Fused

CLASSES = {}
if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(Fused, Linear4bit):
        """PEFT's layer over Linear4bit. Its bytes are read where they lie; it merges as before."""

    CLASSES[Linear4bit] = FusedLinear4bit
