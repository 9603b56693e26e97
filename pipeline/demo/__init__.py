"""`cap demo`: the whole job on drawn scenes, with a backbone that was trained on such scenes."""
