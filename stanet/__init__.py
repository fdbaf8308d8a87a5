"""Few-shot learning: trained networks that name pictures of new classes after a few examples."""
__version__ = "0.1.0"

_FROM = {"Classifier": "classifier", "from_pretrained": "weights"}  # name -> the module that has it; torch is imported when it is asked for

def __getattr__(name):
    if name not in _FROM: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)
