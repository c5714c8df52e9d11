"""What features tell about labelled texts: sparse probes, absorption and splitting."""
