"""HDF5 episodes of robots to reviewed keypoint tracks and back."""
