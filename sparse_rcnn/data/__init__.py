"""Images and annotations: ``decode``, ``transforms``, ``coco``, ``loader`` and the ``synthetic`` scenes."""
