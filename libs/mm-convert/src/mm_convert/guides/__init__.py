"""The commands of MindSpeed-MM's guides."""
