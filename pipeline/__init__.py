"""From photos to captions: photo files, the frozen encoder, the stages, the command line."""
