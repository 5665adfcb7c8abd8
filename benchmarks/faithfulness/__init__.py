"""How faithful explanations are, beside every peer: ``python -m benchmarks.faithfulness``.

Five kinds of networks are trained here, on data that ships in packages or is generated. Nothing is
downloaded. The page that is written is ``docs/faithfulness.md``.
"""
