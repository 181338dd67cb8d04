"""Images and annotations: data sets of any ``formats``, their ``health``, ``transforms``, ``loader``, ``synthetic``."""
