terraform {
  required_version = ">= 1.5"

  required_providers {
    yandex = {
      source  = "yandex-cloud/yandex"
      version = "~> 0.225.0"
    }
  }
}

# Credentials: YC_TOKEN, or YC_SERVICE_ACCOUNT_KEY_FILE, in the environment.
provider "yandex" {
  folder_id = var.folder_id
  zone      = var.zone
}
