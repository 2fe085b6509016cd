"""Quantises a checkpoint layer by layer, with a calibration text (section 4.5)."""
