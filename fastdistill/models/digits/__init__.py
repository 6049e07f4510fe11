"""Handwritten digits as a text-to-image model: data, metrics and the training of the bundled pipelines.

`python -m fastdistill.models.digits --help` trains and measures. Needs scikit-learn: `pip install "fastdistill[demo]"`.
"""
