"""DeploymentConfig -> RayService and the objects around it, and what is wrong with such manifests. Pure; no cluster."""
