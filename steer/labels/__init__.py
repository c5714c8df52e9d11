"""Labels of features: from the tokens they fire on and write, from a language model that is asked, from Neuronpedia."""
