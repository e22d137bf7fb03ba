"""From features to figures: exact CMC, mAP, mINP and TPR@FPR, re-ranking, VehicleID's protocol."""
