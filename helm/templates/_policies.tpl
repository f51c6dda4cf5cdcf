{{/* Rules that network policies share. Knows who may be talked to; which pods need it, the policies say. */}}

{{/* The start of a policy for a component: (dict "root" $ "component" "api" "annotations" (dict)). */}}
{{- define "merger.policy" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "merger.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "merger.labels" . | nindent 4 }}
  {{- with .annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  podSelector:
    matchLabels:
      {{- include "merger.selectorLabels" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
{{- end -}}

{{/* Peers: the pods of a component. */}}
{{- define "merger.policy.component" -}}
- podSelector:
    matchLabels:
      {{- include "merger.selectorLabels" . | nindent 6 }}
{{- end -}}

{{/* Peers: all pods of namespaces, from a list of their names. */}}
{{- define "merger.policy.namespaces" -}}
- namespaceSelector:
    matchExpressions:
      - key: kubernetes.io/metadata.name
        operator: In
        values:
          {{- toYaml . | nindent 10 }}
{{- end -}}

{{/* Egress to name servers, wherever they are: some clusters run them on the nodes. */}}
{{- define "merger.policy.dns" -}}
- ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end -}}

{{- define "merger.policy.database" -}}
- ports:
    - port: {{ ternary 5432 .Values.networkPolicy.databasePort .Values.postgresql.enabled }}
      protocol: TCP
  {{- if .Values.postgresql.enabled }}
  to:
    {{- include "merger.policy.component" (dict "root" $ "component" "postgresql") | nindent 4 }}
  {{- else if .Values.networkPolicy.databaseTo }}
  to:
    {{- toYaml .Values.networkPolicy.databaseTo | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* Egress to the Hub and to object stores of the outside. */}}
{{- define "merger.policy.https" -}}
- ports:
    - port: 443
      protocol: TCP
  to:
    - ipBlock:
        cidr: 0.0.0.0/0
        {{- with .Values.networkPolicy.httpsExcept }}
        except:
          {{- toYaml . | nindent 10 }}
        {{- end }}
    - ipBlock:
        cidr: ::/0
        {{- with .Values.networkPolicy.httpsExcept6 }}
        except:
          {{- toYaml . | nindent 10 }}
        {{- end }}
{{- end -}}
