"""Many networks: trained at once, stored in one file, or read from published data sets."""

from jax_scalegmn.zoo import classifier_zoo, classifiers, inr_folders, small_cnn_zoo
from jax_scalegmn.zoo._populations import Zoo, concatenate, fit, fit_images, load, parts, save, scales

__all__ = [
    "Zoo",
    "classifier_zoo",
    "classifiers",
    "concatenate",
    "fit",
    "fit_images",
    "inr_folders",
    "load",
    "parts",
    "save",
    "scales",
    "small_cnn_zoo",
]
