"""Learning on, aligning and merging neural networks in weight space.

architecture  what a network is made of; the value from which all else follows
builders      the usual architectures (VGG and ResNets: normalised)
network       initialise it, compute its function
symmetry      its symmetry group and how that acts on params
graph         params as a jraph graph, and back
matching      the group element that brings one network closest to another
canonical     one network for all that differ by the phases of their sines
merge         from several networks to one
landscape     the loss between two networks
zoo           thousands of networks trained at once
datasets      labelled images from scikit-learn or files
models        ScaleGMN, encoder, editor, decoder, autoencoder
baselines     encoders without weight-space symmetry, for comparison
losses        what they are trained on
train         steps, epochs, early stopping
checkpoint    best and last, with their configuration
interop       networks and models from PyTorch (files: torch_file)
inr_folders   published INRs, from their files
small_cnn_zoo published CNNs, from their files, and written like them
testing       the checks, for your own networks
"""
