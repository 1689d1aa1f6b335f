"""Arms x seeds of one experiment, compared on the same images: a sweep over many, an ablation over two."""
