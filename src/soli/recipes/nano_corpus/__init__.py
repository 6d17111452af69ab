"""The corpus step of nano-zh-en, nano-gpu and one-gpu: public packages to cleaned Chinese-English text."""
