"""The paper's other studies, one module and one command each: ``python -m bench.accuracy.studies.isolation --data …``."""
