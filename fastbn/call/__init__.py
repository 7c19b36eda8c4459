"""What was asked for, and how is it carried out? The record of a call, its checks, its pieces and its results."""
