"""What vision-language models are made of beside a language model."""
