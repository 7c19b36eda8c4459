"""What does a call ask for, and how is it carried out? Its record, its checks, its pieces and its results."""
