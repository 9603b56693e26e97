"""From photos to captions: photo files, the frozen encoder, the stages and the command line."""
