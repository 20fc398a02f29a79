"""Learning on, aligning and merging neural networks in weight space.

architecture  what a network is made of, written or inferred; the value from which all else follows
builders      the usual architectures (VGG and ResNets: normalised)
network       initialise it, compute its function
symmetry      its symmetry group and how that acts on params
graph         params as a jraph graph, and back
gauge         the member of an orbit with the smallest weights: positive scales settled
canonical     one network for all that differ by a symmetry, in closed form
matching      the group element that brings one network closest to another, by their weights
activation_matching, differentiable_matching    the same by what neurons compute, or by gradient steps
assignment    solvers of the assignment problem
merge         from several networks to one
common_frame  N networks next to each other
repair        a merged network with its end points' activation statistics
task_vectors  what fine-tuning added: task arithmetic and TIES
landscape     the loss along paths and on planes between networks
zoo           thousands of networks trained at once
classifier_zoo    of classifiers over sampled hyper-parameters, with checkpoints
classifiers   a few, on minibatches, with normalisation
datasets      labelled images from scikit-learn or files
models        ScaleGMN, encoder, editor, decoder, autoencoder
baselines     encoders without weight-space symmetry, for comparison
losses        what they are trained on
train         steps, epochs, early stopping
checkpoint    best and last, with their configuration
interop       networks and models from PyTorch, and back (files: torch_file)
network_files networks in files of any format, and back in the same
cli           align, merge and check without code: jax-scalegmn --help
inr_folders   published INRs, from their files
small_cnn_zoo published CNNs, from their files, and written like them
testing       the checks, for your own networks
"""
