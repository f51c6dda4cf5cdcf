"""Runs one attempt of one job on a Ray cluster. Knows Ray and the API's runner side; knows no database."""
