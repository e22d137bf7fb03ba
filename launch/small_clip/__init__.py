"""The CLIP in small that the demo starts from: rendered pictures and their captions, contrastive training, its file."""
